"""Does an export find what the checkpoint finds? What is still all right, and what an export warns of itself."""

from typing import Any

# What is still all right, by precision: least share of detections found again, least mean mask IoU, and the largest
# loss of AP. Float32 exports differ by rounding alone; the others are for the reader to judge from these on.
BOUNDS = {
    "float32": {"matched_share": 0.99, "mask_iou_mean": 0.99, "ap_loss": 0.002},
    "bfloat16": {"matched_share": 0.95, "mask_iou_mean": 0.95, "ap_loss": 0.005},
    "float16": {"matched_share": 0.98, "mask_iou_mean": 0.98, "ap_loss": 0.005},
    "int8": {"matched_share": 0.92, "mask_iou_mean": 0.92, "ap_loss": 0.005},
}


def find_warnings(report: dict[str, Any], precision: str) -> list[str]:
    """What of a comparison is beyond the bounds of its precision, one sentence each."""
    bounds = BOUNDS[precision]
    warnings = []
    for name, what in (("matched_share", "share of detections found again"), ("mask_iou_mean", "mean mask IoU")):
        value = report[name]
        if value is None or value < bounds[name]:
            shown = "not known" if value is None else f"{value:.4f}"
            warnings.append(f"the {what} is {shown}, below {bounds[name]} for {precision}")
    scored = report.get("ap")
    if scored and scored["loss"] is not None and scored["loss"] > bounds["ap_loss"]:
        warnings.append(f"the export loses {scored['loss']:.4f} mask AP, more than {bounds['ap_loss']} for {precision}")
    return warnings
