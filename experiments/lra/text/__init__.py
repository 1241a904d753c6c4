"""Text: whether a review of a film praises it, read letter by letter.

The IMDB reviews of Maas et al. (2011) as a task of Long Range Arena (Tay et al., 2021).
"""
