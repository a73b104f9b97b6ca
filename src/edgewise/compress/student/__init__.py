"""What a student is made of: the teacher's weights and tokenizer, cut down."""
