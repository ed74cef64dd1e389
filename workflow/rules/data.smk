rule prepare_data:
    output:
        train="<results>/prepare_data/train.safetensors",
        val="<results>/prepare_data/val.safetensors",
        test="<results>/prepare_data/test.safetensors",
        manifest="<results>/prepare_data/manifest.json",
    log:
        "<logs>/prepare_data.log",
    benchmark:
        "<benchmarks>/prepare_data.tsv"
    conda:
        "../../environment.yml"
    threads: 8
    resources:
        mem_mb=per_attempt(8000),
        runtime=60,
    params:
        settings=settings("prepare_data"),
        seed=run.seed,
        images=lambda wildcards: image_fingerprint(run.prepare_data),
    shell:
        "python -m proard.stages.prepare_data --settings {params.settings:q} --seed {params.seed}"
        " --threads {threads} --device cpu"
        " --train {output.train:q} --val {output.val:q} --test {output.test:q} --manifest {output.manifest:q}"
        " 2>&1 | tee {log:q}"
