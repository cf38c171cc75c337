"""Reference optimizers, one file per paper, for systems that no maintained library has; written to be read beside the paper."""
