"""A loaded model scored on a data set, and what that leaves behind.

Doors: `run.score_model` (model in, scores out), `outcome.write_outcome` (report and files), `pictures` (what an export
is compared and calibrated on), `tta` (several views of a picture). COCO's arithmetic is in `evaluation`.
"""
