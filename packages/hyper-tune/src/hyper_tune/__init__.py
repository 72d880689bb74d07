"""HyperAdaLoRA fine-tuning of language models: torchtune recipes, exact resume, plain LoRA export."""
