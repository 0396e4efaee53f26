"""A network as a file: every format's writer and reader, side by side.

`formats.FORMATS` describes each format once and `exported` finds and opens an export's folder. A network is here only
a function from images to detections; what becomes of an export (config, parity, scores) is in `export`.
"""
