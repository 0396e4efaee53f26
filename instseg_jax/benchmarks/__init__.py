"""How long things take: `inference` step by step, `training` steps, `runtimes` of exports side by side."""
