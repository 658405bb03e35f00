"""Serve a target whose clients choose, request by request, what steers it.

What reads requests needs no torch, so the modules are imported one by one.
"""
