"""`python -m datasets.check CONFIG`: is this data what the configuration says, and is it read fast enough?

Lives here: rows.py (every row against disk), lists.py (what a list is as a whole), pictures.py (contact sheet, classes),
speed.py (what the training loader feeds), report.py (findings and the files they go to), __main__.py (command line).
Does not live here: reading and transforming videos. Everything is seen through the readers and loaders of training.
"""
