"""Operations to layers.

`fusion` merges, `lowering` gives every tensor its scale, `weights` quantizes what is trained.
"""
