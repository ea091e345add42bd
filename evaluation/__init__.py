"""The numbers of the field: features, statistics and metrics of sampled images."""
