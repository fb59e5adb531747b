"""Online RLHF: sample, judge, train and publish, in rounds."""

__version__ = "0.1.0"
