"""`tune run hyper-tune/lora_full --config NAME`, on any number of processes."""

from hyper_tune.torchtune.cli import main

if __name__ == "__main__":
    main("lora")
