"""Trains the small teachers of the default job on scenes, and measures them on scenes never seen.

    python -m unimrg.teachers.fit depth        a Depth Anything (arXiv 2406.09414)
    python -m unimrg.teachers.fit sam          a Segment Anything (arXiv 2304.02643)

Both are the model library's own classes at about a million parameters: so the job runs the code that runs
the published teachers. The scenes are `unimrg.data.scenes`: their depth and their instances are exact.
"""
