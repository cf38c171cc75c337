"""How large what is read of a run may be, whoever wrote it: what its files can demand of memory and time. Of documents, `bounded_json` says it."""

# A run of 80 layers has some 10⁴ records of 600 matrices; these are far from it, and what they allow fits in memory.
MAX_RECORDS, MAX_MATRICES, MAX_CELLS = 10_000_000, 100_000, 200_000_000  # cells: records times matrices of a group
MAX_UNBACKED_CELLS = 60_000_000  # of a group that need not have a byte each in the run's files
MAX_ALONG = 256  # any other dimension: tiles of a map are most
MAX_CHUNK = 2**29  # bytes of a chunk, decoded
MAX_TEXT = 2**24  # of all texts of an array
MAX_FILES = 400_000  # of an array
MAX_UNMAPPED = 100_000  # files of which only a look tells whether they are there
MAX_SHARDED = 2**16  # chunks in a shard
MAX_NODES = 20_000  # groups and arrays
MAX_OPENED = 2**29  # bytes of steps and names, which opening reads
MAX_LOGGED = 100_000  # of what a run's attributes list
MAX_DAMAGE = 10_000  # chunks that are found damaged in one go; a repair looks again
