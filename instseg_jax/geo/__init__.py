"""Where pixels lie on the ground: `rasters` reads and writes GeoTIFFs, `georeference` turns outlines into layers."""
