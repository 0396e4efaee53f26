"""What was found in an image, drawn and written; knows no network.

Doors: `result.Result` (one image's instances), `saving.save_results` (a stream of them into a folder), `visualize`
(instances drawn on a picture), `figures` (charts), `formats` (COCO, LabelMe, YOLO), `video`.
"""
