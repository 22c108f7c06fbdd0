"""Find what can be decoded in files that are damaged, joined, or without a length.

The bytes of a file are checked before it is decoded. `accent_plugin.audio.damaged.survey` divides it into parts that
libsndfile can decode, and says how many seconds are lost between them. A sound file is one part: the whole file.
"""
