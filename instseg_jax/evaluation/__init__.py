"""How good the instances are: COCO metrics and what is built on them."""
