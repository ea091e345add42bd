"""The numbers of the field: features, statistics and metrics of sampled images."""

METRICS = ("is", "fid", "sfid", "pr")  # here, so that --help needs no more than this
