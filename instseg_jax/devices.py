"""Which devices a text names. How batches and states are laid out on them is `training/sharding.py`."""

import re

import jax


def select_devices(device: str) -> list[jax.Device]:
    """The devices that a text names: auto (all of the default backend), cpu, gpu, gpu:0,1, tpu.

    Raises: ValueError that lists what there is when the text is of another form or names an absent device.
    """
    match = re.fullmatch(r"(auto|cpu|gpu|tpu)(?::(\d+(?:,\d+)*))?", device)
    present = ", ".join(f"{d.platform}:{d.id}" for d in jax.devices())
    if not match:
        raise ValueError(f"device is {device!r}; allowed are auto, cpu, gpu, tpu, gpu:0,1; present are {present}")
    platform, indices = match.groups()
    try:
        devices = jax.devices() if platform == "auto" else jax.devices(platform)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, but there is no {platform} here; present are {present}") from error
    if indices is None:
        return list(devices)
    wanted = [int(index) for index in indices.split(",")]
    by_id = {d.id: d for d in devices}
    absent = [index for index in wanted if index not in by_id]
    if absent or len(set(wanted)) != len(wanted):
        names = ", ".join(f"{platform}:{index}" for index in by_id)
        raise ValueError(f"device is {device!r}; each index once, out of {names}")
    return [by_id[index] for index in wanted]
