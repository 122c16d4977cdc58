"""The passes, one file each: a pass takes what was recognised in a neutral graph and returns edits.

A pass is a frozen dataclass whose fields are its options, keeps no state, and never names a front end.
Adding one is a file here and its name in `normfuse.passmanager.passes`.
"""
