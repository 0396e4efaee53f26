"""Should the decoder's reference boxes start from the encoder's masks (mask-enhanced) or from its boxes?

Command:   python run.py sweep --config=configs/ablations/mask_enhanced.py --config.data.dir=balloon --seeds=2
           --workdir=runs/ablations
Hardware:  two CPU cores.
Answer:    not yet run.
"""

import base
from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    return base.get_config(arg)


def sweep(add):
    add({}, name="boxes")
    add({"model.mask_enhanced": True}, name="masks")
