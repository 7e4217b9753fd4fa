"""Other families' checkpoints, one file a family, named by transformers' `model_type`; see `entropi.model.convert`."""
