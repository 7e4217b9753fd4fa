"""Training under the transformers Trainer: recipe, monitors, evaluation."""
