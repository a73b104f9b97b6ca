"""Work in processes of their own: a job as JSON, an answer as JSON, arrays as .npy files beside them."""
