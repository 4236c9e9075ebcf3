"""Root fields, one file per noun: check the input, call one service, shape the answer."""
