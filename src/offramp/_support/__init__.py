"""What every floor leans on and nobody imports from outside: files, names, arguments, progress,
processes.
"""
