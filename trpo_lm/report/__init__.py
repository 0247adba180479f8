"""What is drawn and written from the files of a run: figures, statistics, the model card.

Imports numpy and matplotlib, no torch and, of this package, only the modules beside the folders: a
run of last year can be drawn again without its model.
"""
