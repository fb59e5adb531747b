"""The one package that imports vLLM: its engine as samplers, scorers and weight receivers need it."""
