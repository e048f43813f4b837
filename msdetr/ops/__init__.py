"""Operations: per op a public function, argument checks, a PyTorch reference, registration."""
