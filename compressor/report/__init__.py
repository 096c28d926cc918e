"""Descriptions of runs and models: report.json, its page, the model card, `compress inspect`, runtime compatibility."""
