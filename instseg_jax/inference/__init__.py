"""Images in, instances out.

Doors: `pipeline.create_pipeline` (whatever holds images in, results out), `predictor.load_model` (weights in, a
function from images to detections out). Results are drawn and written in `results`, exports made in `export`.
"""
