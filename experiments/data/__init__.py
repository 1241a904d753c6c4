"""Looks at the data sets of all experiments: pictures of their samples, and how fast their loaders are."""
