"""The torchtune recipe: the one part of the package that imports torchtune and torchao."""
