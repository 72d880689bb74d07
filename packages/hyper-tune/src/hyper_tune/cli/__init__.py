"""The command `hyper-tune`: one verb a file, none of which needs torchtune to be imported."""
