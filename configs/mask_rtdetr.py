"""The official recipe of Mask-RT-DETR, complete: `--config=configs/mask_rtdetr.py:l`, sizes n, s, m, l, x, h.

Command:   python run.py train --config=configs/mask_rtdetr.py:l --config.data.dir=DIR --workdir=output
Source:    PaddleDetection at 666f597fd0, configs/mask_rtdetr; 72 epochs on COCO 2017, 4 GPUs of 4 images.
Published: mask AP on COCO val 41.0 / 42.7 / 45.7 / 47.5 / 50.6 for S / M / L / X / H, from pretrained
           backbones. Not yet run here: size N is ours and has no published number.

Every field stands here with its unit; other configs start from this one and change what they must.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

# Learning rate of the backbone's stages relative to the rest; the stem is frozen in all official sizes.
BACKBONE_MULTIPLIER = {"n": 1.0, "s": 0.1, "m": 0.1, "l": 0.05, "x": 0.01, "h": 0.01}


def get_config(size: str = "l") -> ConfigDict:
    """The recipe for one size: n, s, m, l, x or h."""
    if size not in BACKBONE_MULTIPLIER:
        raise ValueError(f"unknown size {size!r} of configs/mask_rtdetr.py, it must be one of n, s, m, l, x, h")
    config = ConfigDict()
    config.seed = 0
    config.device = "auto"  # auto, cpu, gpu, gpu:0,1

    config.model = model = ConfigDict()
    model.name = f"mask_rtdetr_{size}"  # the sizes themselves: instseg_jax/models/variants.py
    model.num_classes = placeholder(int)  # None: as many as the data set has
    model.num_queries = 300
    model.num_decoder_layers = placeholder(int)  # None: as the size has it
    model.num_prototypes = placeholder(int)  # None: as the size has it
    model.mask_enhanced = True  # reference boxes start from the encoder's masks; False: from its boxes
    model.rectangular = "corrected"  # positions of non-square inputs; "official" swaps height and width
    model.frozen_backbone_norm = True  # batch norms of the backbone keep their running statistics
    model.dtype = "float32"  # or bfloat16: compute in it; parameters, boxes and losses stay float32
    model.remat = False  # recompute decoder layers in the backward pass: less memory, more time
    model.weights = ""  # start from this file, checkpoint or known name; "": from scratch
    model.weights_skip = placeholder(tuple)  # tensors that start anew all the same: ("transformer/score_head/*",)

    config.data = data = ConfigDict()
    data.dir = ""  # folder with annotations/ and images/ (or COCO 2017's own layout)
    data.source = "folder"  # or tfds: dir is what the verb prepare wrote
    data.train_annotations = placeholder(str)  # None: found by the layout; relative to dir
    data.val_annotations = placeholder(str)
    data.train_images = placeholder(str)
    data.val_images = placeholder(str)
    data.channels = 3  # of the pictures; others than 3 need their stem trained: optimizer.frozen without it
    data.scaling = "none"  # or percentile: bring 16-bit or float pixels to 8 bits, each channel by its own range
    data.scale_percentiles = (1.0, 99.0)  # of the training pictures: what becomes 0 and 255
    data.channel_ranges = placeholder(tuple)  # (low, high) of each channel; None: filled in when training starts
    # Of pictures that convert cut from maps, filled in when training starts: how predict reads rasters.
    data.map_gsd = placeholder(float)  # metres on the ground of a pixel
    data.map_bands = placeholder(tuple)  # names or numbers of those shown as red, green and blue; None: the colours
    data.map_stretch = placeholder(tuple)  # values of these that become 0, and those that become 255
    data.image_size = 640  # pixels, of evaluation and prediction
    data.train_sizes = (480, 512, 544, 576, 608, 640, 640, 640, 672, 704, 736, 768, 800)  # one is drawn a batch
    data.resize = "stretch"  # or letterbox: keep the aspect ratio and fill the rest
    data.interpolations = ("nearest", "linear", "area", "cubic", "lanczos")  # one is drawn a batch
    data.eval_interpolation = "cubic"
    data.max_instances = 100  # target slots of an image; of more objects a random choice is trained on
    data.mask_stride = 1  # target masks at the network input's resolution divided by this
    data.mask_rasterization = "exact"  # or polygon: rasterise at the target resolution, quicker
    data.keep_empty = False  # train on images without objects too
    data.empty_share = placeholder(float)  # share of images without objects in an epoch; None: as keep_empty says
    data.skip_invalid = False  # leave out objects with a malformed mask or box, instead of stopping
    data.allow_change = placeholder(bool)  # True: resume although pictures or annotations are others than before
    data.allow_outside = placeholder(bool)  # True: pictures may lie outside of their folder, by links, `..` or paths
    data.refit_boxes = False  # fit boxes to what a crop leaves of the masks
    data.drop_empty_masks = placeholder(bool)  # leave out objects without a mask pixel at the trained size; None: keep
    data.num_workers = 2  # threads, or processes
    data.use_processes = False  # worth trying beyond about eight cores; on two, threads are twice as fast
    data.prefetch = 4  # batches prepared ahead

    data.augment = augment = ConfigDict()
    augment.photometric_probability = 0.8
    augment.expand_probability = 0.5
    augment.expand_max_ratio = 4.0
    augment.crop_probability = 0.8
    augment.flip_probability = 0.5
    augment.vertical_flip_probability = 0.0
    augment.quarter_turns = False
    augment.scale_jitter = placeholder(tuple)  # (least, most) zoom, milder than expand and crop; None: off
    augment.copy_paste_probability = 0.0  # of an image to get objects of another one
    augment.copy_paste_max_objects = 5
    augment.copy_paste_scale = (0.5, 1.5)  # (least, most) of a pasted object

    config.denoising = denoising = ConfigDict()
    denoising.num_denoising = 100  # noised objects fed beside the queries; 0: none
    denoising.label_noise_ratio = 0.5
    denoising.box_noise_scale = 1.0

    config.loss = loss = ConfigDict()
    for prefix in ("", "match_"):  # of the loss terms, and of the costs that match queries with objects
        loss[f"{prefix}class_weight"] = 4.0
        loss[f"{prefix}box_l1_weight"] = 5.0
        loss[f"{prefix}box_giou_weight"] = 2.0
        loss[f"{prefix}mask_bce_weight"] = 5.0
        loss[f"{prefix}mask_dice_weight"] = 5.0
    loss.alpha = 0.75  # of the varifocal class loss: weight of the background
    loss.gamma = 2.0
    loss.num_points = 12544  # sampled in each mask, for the costs and for the losses
    loss.oversample_ratio = 3.0  # candidates, of which the most uncertain are kept
    loss.important_ratio = 0.75  # share of the points that are chosen by uncertainty
    loss.iou_target = "mask"  # class target of matched queries: IoU of masks, boxes ("box") or 1 ("none")
    loss.aux_iou_target = "box"  # the same, for the auxiliary prediction sets

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 1e-4
    optimizer.base_batch_size = placeholder(int)  # 16: the rate is meant for it and scaled to train.batch_size
    optimizer.multipliers = ((r"^backbone/", BACKBONE_MULTIPLIER[size]),)  # first match of the parameter's path
    optimizer.frozen = (r"^backbone/stem/", r"^backbone/.*/bn/(scale|bias)$")
    optimizer.weight_decay = 1e-4  # on every trainable parameter, norms and biases too
    optimizer.decay_exclude = ()  # patterns of parameters without weight decay
    optimizer.beta1 = 0.9
    optimizer.beta2 = 0.999
    optimizer.epsilon = 1e-8
    optimizer.clip_norm = 0.1  # of all gradients together
    optimizer.schedule = "constant"  # or cosine, step
    optimizer.warmup_steps = 2000
    optimizer.warmup_start = 0.001  # of the learning rate
    optimizer.final_fraction = 0.0  # of the learning rate, where a cosine ends
    optimizer.step_milestones = (0.8, 0.95)  # of the whole run, where a step schedule multiplies the rate
    optimizer.step_factor = 0.1
    optimizer.ema_decay = 0.9999
    optimizer.ema_ramp_steps = 2000  # decay(k) = ema_decay * (1 - exp(-(k + 1) / ema_ramp_steps))

    config.train = train = ConfigDict()
    train.epochs = 72
    train.batch_size = 16  # images a step, over all devices
    train.micro_batches = 1  # parts that a batch is worked through in, one after the other: less memory
    train.early_stopping = placeholder(int)  # evaluations in a row without a better score, then it ends; None: never
    train.max_skipped_steps = 20  # steps with non-finite losses in a row after which training gives up

    config.eval = evaluation = ConfigDict()
    evaluation.every_epochs = 1
    evaluation.batch_size = 4
    evaluation.num_detections = 100  # (query, class) pairs kept an image
    evaluation.best_metric = "segm/AP"
    evaluation.engine = "pycocotools"  # or faster-coco-eval, hotcoco: the same numbers sooner, where installed
    evaluation.boundary = True  # the verb evaluate tells Boundary AP too
    evaluation.gallery_size = 12  # pictures of each gallery in the report
    evaluation.tta_scales = (0.75, 1.25)  # of image_size, beside 1, with --tta=scales

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 1000
    checkpoint.keep = 3
    checkpoint.export = ""  # or stablehlo, onnx, ort, openvino: best_model/inference is written when training ends

    config.log = log = ConfigDict()
    log.every_steps = 1  # rows of metrics.jsonl
    log.trackers = ()  # of tensorboard, trackio, wandb, mlflow: they get the same numbers, and the pictures
    log.pictures = 4  # validation pictures drawn at an evaluation, into WORKDIR/validation
    if size == "n":
        _without_pretrained_backbone(config)
    return config


def _without_pretrained_backbone(config: ConfigDict) -> None:
    """Size N has no pretrained backbone: everything trains, batch norms too."""
    config.model.frozen_backbone_norm = False
    config.optimizer.frozen = ()
