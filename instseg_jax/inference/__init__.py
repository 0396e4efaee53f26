"""Images in, instances out: post-processing, results and their drawing."""
