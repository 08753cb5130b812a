"""Raw downloads -> frame folders and lists: one maker a file, each run as `python -m datasets.prepare.<name> --out DIR`.

frame_order.py    makes a small dataset whose four classes differ only in the order of frames; needs no download
ucf101_groups.py  UCF101's class folders -> lists split by whole groups and, on request, extracted frames
lists.py          what the makers share: writing list files and labels, and the error a user can cause

Does not live here: reading lists or frames for training (datasets/annotation.py, datasets/readers.py). Nothing outside
this room imports a maker; what crosses its door are files: list rows `path num_frames label` for frame folders or
`path label` for videos, labels as csv with the header `id,name`, frames numbered from 1 as `{:06d}.jpg`.
"""
