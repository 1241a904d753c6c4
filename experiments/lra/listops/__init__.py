"""ListOps: nested lists of digits under MIN, MAX, MED and SM, whose value is to be named.

The task of Nangia and Bowman (2018) in the long form of Long Range Arena (Tay et al., 2021).
"""
