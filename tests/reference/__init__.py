"""The original networks in plain torch, under their original names: what a conversion must equal.

Written from the papers and from the layout of the published checkpoints. Nothing here is shared with
the library or with diffusers.
"""
