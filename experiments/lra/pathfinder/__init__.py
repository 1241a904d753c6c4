"""Pathfinder: do two discs lie on the ends of one dashed curve, or of two?

The task of Linsley et al. (2018) in the sizes of Long Range Arena (Tay et al., 2021): 32 × 32 pixels, 128 × 128
(Path-X) and 256 × 256 (Path256).
"""
