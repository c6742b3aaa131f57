"""Token data made elsewhere: found, read where they are, and never written to.

`detection` says what the files of a folder are, by the readers of one format each: `bin_files`,
`megatron`, `datatrove`, `litdata_chunks`, `arrow_rows`. Each gives `token_file.TokenFile`s, which
`token_data` divides into spans and `span_reader` reads.
"""
