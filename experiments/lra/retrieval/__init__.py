"""Retrieval: whether two papers cite each other, both read letter by letter.

The ACL Anthology Network (Radev et al., 2013) as a task of Long Range Arena (Tay et al., 2021).
"""
