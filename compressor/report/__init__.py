"""Describe a run and a model: report.json, its page, the model card, `compress inspect`, which software loads the result."""
