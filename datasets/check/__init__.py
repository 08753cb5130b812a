"""`python -m datasets.check CONFIG`: is the data what the configuration says, and is it read fast enough?

rows.py: each row against disk. lists.py: a list as a whole. doubts.py: rows that are probably not what was meant.
figures.py: contact sheet and class balance. speed.py: the rate of the training loader. report.py: findings and the
report. Videos are read as in training, by its readers and loaders.
"""
