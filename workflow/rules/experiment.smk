# Variants of the training, each with several seeds, from one teacher; measured alike and compared. Nothing here is
# planned by `rule all` unless the config lists variants.


# One thread, as for evaluation: on a CPU, trainings side by side beat one training on many threads.
rule train_variant:
    input:
        train=rules.prepare_data.output.train,
        val=rules.prepare_data.output.val,
        teacher=rules.train_teacher.output.teacher,
        previous=previous_leg,
        control=plain_network_of_leg,
    output:
        supernet="<results>/train_variant/{variant}/seed={variant_seed}/{leg}/supernet.safetensors",
        history="<results>/train_variant/{variant}/seed={variant_seed}/{leg}/history.parquet",
    log:
        "<logs>/train_variant/{variant}/seed={variant_seed}/{leg}.log",
    benchmark:
        "<benchmarks>/train_variant/{variant}/seed={variant_seed}/{leg}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=per_attempt(8000),
        runtime=2880,
        gpu=1,
    params:
        settings=leg_settings,
        seed=lambda wildcards: wildcards.variant_seed,
        previous=lambda wildcards, input: f"--previous {input.previous}" if input.previous else "",
        control=lambda wildcards, input: f"--control {input.control}" if input.control else "",
    shell:
        "python -m proard.stages.train_variant --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --train {input.train:q} --val {input.val:q}"
        " --teacher {input.teacher:q} {params.previous} {params.control}"
        " --supernet {output.supernet:q} --history {output.history:q} 2>&1 | tee {log:q}"


rule measure_variant:
    input:
        supernet=last_leg,
        archs=rules.sample_archs.output.archs,
        train=rules.prepare_data.output.train,
        val=rules.prepare_data.output.val,
        test=rules.prepare_data.output.test,
    output:
        table="<results>/measure_variant/{variant}/seed={variant_seed}/table.parquet",
        outcomes="<results>/measure_variant/{variant}/seed={variant_seed}/outcomes.safetensors",
    log:
        "<logs>/measure_variant/{variant}/seed={variant_seed}.log",
    benchmark:
        "<benchmarks>/measure_variant/{variant}/seed={variant_seed}.tsv"
    conda:
        "../../environment.yml"
    threads: 1
    resources:
        mem_mb=per_attempt(8000),
        runtime=per_attempt(480),
        gpu=1,
    params:
        settings=settings("measure_variant"),
        seed=run.seed,
        cache=CACHE,
    shell:
        "python -m proard.stages.measure_variant --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device auto --supernet {input.supernet:q} --archs {input.archs:q}"
        " --train {input.train:q} --val {input.val:q} --test {input.test:q} --variant {wildcards.variant}"
        " --train-seed {wildcards.variant_seed} --cache {params.cache:q} --table {output.table:q}"
        " --outcomes {output.outcomes:q} 2>&1 | tee {log:q}"


rule compare_variants:
    input:
        train=rules.prepare_data.output.train,
        teacher=rules.train_teacher.output.teacher,
        tables=of_every_variant("<results>/measure_variant/{variant}/seed={variant_seed}/table.parquet"),
        outcomes=of_every_variant("<results>/measure_variant/{variant}/seed={variant_seed}/outcomes.safetensors"),
        histories=of_every_leg("<results>/train_variant/{variant}/seed={variant_seed}/{leg}/history.parquet"),
    output:
        table="<results>/compare_variants/table.parquet",
        figure="<results>/compare_variants/variants.svg",
    log:
        "<logs>/compare_variants.log",
    benchmark:
        "<benchmarks>/compare_variants.tsv"
    conda:
        "../../environment.yml"
    resources:
        mem_mb=per_attempt(4000),
        runtime=30,
    params:
        settings=settings("compare_variants"),
        seed=run.seed,
    shell:
        "python -m proard.stages.compare_variants --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device cpu --train {input.train:q} --teacher {input.teacher:q}"
        " --tables {input.tables:q} --outcomes {input.outcomes:q} --histories {input.histories:q}"
        " --table {output.table:q} --figure {output.figure:q} 2>&1 | tee {log:q}"
