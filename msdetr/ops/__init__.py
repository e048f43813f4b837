"""Operations: a public function, its PyTorch reference of the same signature, its checks."""
