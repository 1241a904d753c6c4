"""Activity of the human brain: the next volume of a run, and which task a person is doing.

The data and the questions of Thomas, Ré and Poldrack (2022), *Self-supervised learning of brain dynamics from broad
neuroimaging data*, which the paper's models of fMRI are trained on.
"""
