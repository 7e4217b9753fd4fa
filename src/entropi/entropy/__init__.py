"""The entropy operation, its regulariser and its diagnosis: tensors in, tensors out; knows no model."""
