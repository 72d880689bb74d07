"""`tune run hyper-tune/hyperadalora_full --config NAME`, on any number of processes.

The paper's method; a configuration that names another is run as it says.
"""

from hyper_tune.torchtune.cli import main

if __name__ == "__main__":
    main()
