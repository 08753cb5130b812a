"""Raw downloads -> frame folders and lists.

    python -m datasets.prepare ucf101|hmdb51|ssv2|ssv1|k400|diving48|folder --videos DIR --annotations DIR --out DIR
    python -m datasets.prepare.synthetic --out DIR    a small dataset that is drawn, not downloaded

__main__.py    the command line
run.py         the order of the steps: below, from left to right
survey.py      which annotations and archives are needed; options.py what is asked for
formats/       owners' annotations -> plan.py's Plan, one file a dataset; owners.py finds and reads the files
archives.py    unpacks what was downloaded (pieces.py: files cut in pieces)
catalogue.py   which videos are there, and which are the plan's (walk.py: the way through a folder)
extract.py     frames of all videos; decode.py of one (declared.py: how many it should have); space.py room on the disk
report.py, lists.py, snippet.py, workplace.py    what is left in the output folder; unpacked/ there is archives.py's

Does not live here: reading lists or frames for training (datasets/annotation.py, datasets/readers.py). Nothing outside
this room imports from it; what crosses its door are files: list rows `path num_frames label` for frame folders or
`path label` for videos, labels as csv with the header `id,name`, frames numbered from 1 as `{:06d}.jpg`.
"""
