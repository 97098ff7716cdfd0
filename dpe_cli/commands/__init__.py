"""The commands: they parse, call and print, and decide nothing about video.

Heavy imports are inside the commands, so that --help answers at once.
"""
